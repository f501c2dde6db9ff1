"""The verbs that this provider adds to ``pipeline``: one module each, with ``add_arguments`` and ``run``."""
