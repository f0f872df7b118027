"""Language and vision-language models: loading, visual embedding, loss, saving."""
