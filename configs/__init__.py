"""Recipes: strings and numbers, one file each; every one starts from `common.base()`."""
