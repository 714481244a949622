"""The demo: the roster of one host on one card, told live and checked, in about half a minute.

`python -m libclient.demo` starts a daemon on a private socket and the agents as processes of their
own, and ends all of them. It reaches into none: it sees what any client sees, and what the agents
say.
"""
