"""The server of bundles: many requests on one loaded bundle, by the OpenAI API; only here may starlette be needed."""
