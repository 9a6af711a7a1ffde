"""Passes that write onnxruntime's contrib operators (com.microsoft) as standard ones.

They run before all others (but the one that inlines constants) and write what torch's exporters write, too. An op, or a use
of one, that the standard has no form for stays as it is, with the reason as a near miss.
"""
