"""Serves loaded bundles by the OpenAI API, many requests at once. Only here may starlette be needed."""
