"""What a decode step does on the host: metadata, scratch, graph capture, the engine."""
