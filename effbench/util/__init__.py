"""What has nothing to do with language models."""
