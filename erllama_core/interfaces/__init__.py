"""What a plugin is written against, one module per kind.

``backend``, ``tier``, ``pressure`` and ``stream`` hold the protocols, ``grammar`` what replies are
held to, ``markers`` what marks their parts, ``telemetry`` what listeners are told, ``block`` the
codec of stored objects, ``log`` the loggers. Nothing here imports another part of the core but
``errors``, ``results`` and ``prompt``.
"""
