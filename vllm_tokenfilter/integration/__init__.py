"""The one room that imports vLLM; each module names the vLLM file it leans on."""
