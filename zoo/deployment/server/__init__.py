"""Serving bundles over HTTP: the app, its limits, its queue, and the page. Needs the extra `serve`, and no torch."""
