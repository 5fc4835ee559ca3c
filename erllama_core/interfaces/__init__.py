"""What a plugin is written against, one module per kind.

``backend``, ``tier``, ``pressure`` and ``stream`` hold the protocols, ``grammar`` what replies are
held to, ``telemetry`` what listeners are told, ``block`` the codec of stored objects. Nothing
here imports another part of the core but ``errors`` and ``results``.
"""
