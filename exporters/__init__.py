"""Recipes that build, train and export the models that the project uses; development only, run from a checkout."""
