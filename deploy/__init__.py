"""Deployment of the server: images, Kubernetes, monitoring. Part of the checkout, not of the package."""
