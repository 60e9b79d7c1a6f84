"""The demo: an escape from a saddle, and training over a slow link, each as one file with its training loop."""
