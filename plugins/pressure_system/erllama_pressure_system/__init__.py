"""Memory pressure of the host and of the process's cgroup."""
