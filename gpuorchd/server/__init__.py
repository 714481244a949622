"""The server room: the wire on one side, events and effects of the core on the other."""
