"""What fits before a machine is rented: capacity by vLLM's own start-up arithmetic."""
