"""Quality at equal budget: perplexity and divergence, the paper's tasks, and recall over long contexts."""
