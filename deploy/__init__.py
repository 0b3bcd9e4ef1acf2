"""What runs the server elsewhere: images, Kubernetes, monitoring. Of the checkout, not installed."""
