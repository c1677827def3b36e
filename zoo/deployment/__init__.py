"""Deployment: from a trained run to predictions on new images."""
