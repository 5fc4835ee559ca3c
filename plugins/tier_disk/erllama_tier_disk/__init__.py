"""Cache tiers that keep one file per object: ``disk``, and ``ram_file`` on a tmpfs."""
