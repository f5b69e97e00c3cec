"""The blocks of a Llama: found, walked, replaced, saved."""
