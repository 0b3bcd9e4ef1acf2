"""The inference server: `app.serve(config)` runs it; `app` draws the whole object graph."""
