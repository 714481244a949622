"""The command `gpuorch`: look at the daemon, ask it, and run commands on leased GPU memory.

`main` reads the command line (`grammar`) and loads the one module that the command needs. Commands
are functions of an `Invocation` that return an exit code (`exits`). What is printed goes through
`screen`, where text from other users is made harmless.
"""
