"""The workers and their nodes: launch, collectives, signals, memory."""
