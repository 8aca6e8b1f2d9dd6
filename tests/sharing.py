"""A Llama in which some layers read another layer's cache, as Gemma 3n's last ones do; a Llama has a reference."""


def reading_attention(reads):
    """What takes the place of `Attention` in vLLM's Llama.

    Args:
        reads: reader -> owner, indices of layers.
    """
    from vllm.model_executor.models import llama
    from vllm.model_executor.models.utils import extract_layer_index

    class Reading(llama.Attention):
        def __init__(self, *args, prefix="", **kwargs):
            index = extract_layer_index(prefix)
            if index in reads:
                kwargs["kv_sharing_target_layer_name"] = prefix.replace(f".{index}.", f".{reads[index]}.")
            super().__init__(*args, prefix=prefix, **kwargs)

    return Reading
