"""The only package that imports vLLM; each module names the vLLM file it depends on.

The modules here are shared by the packages cpu, gpu, server and offline, which import them. Only `dispatch` and
`worker`, which vLLM loads by path, import from those.
"""
