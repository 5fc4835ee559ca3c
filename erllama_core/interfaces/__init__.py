"""What a plugin is written against, one module per kind.

``backend`` and ``tier`` and ``pressure`` and ``stream`` hold the protocols, ``block`` the
codec of stored objects. Nothing here imports another part of the core but ``errors`` and
``results``.
"""
