"""PyTorch architectures, the registry of them (`models.zoo`) and the recipes that train them (`models.training`)."""
