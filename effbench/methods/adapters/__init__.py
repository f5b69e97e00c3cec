"""Low-rank and other adapters on a base that stays as it is."""
