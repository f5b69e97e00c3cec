"""Methods that change what a cache keeps."""
