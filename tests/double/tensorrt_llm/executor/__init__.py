"""Where requests go: `worker.py` in this process, or `proxy.py` to a worker process."""
