"""Log-likelihoods of many requests and at many points."""
