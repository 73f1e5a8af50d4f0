"""What a finished adapter becomes: a merged model, GGUF files, and the check of them."""
