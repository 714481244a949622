"""The pure core: events in, effects out, time an input. Imports nothing but itself."""
