"""Programs behind the figures and tables of docs/: one per page."""
