"""What runs inside: freshly executed with `python -I -S`, from this folder alone, on the standard library.

zygote (in an empty mount namespace, modules preloaded) -> a launcher a place (PID 1 of its namespaces) -> an interpreter.

Nothing here may import agentloop, and modules import each other relatively: in there, this package's name is `jail`.
"""
