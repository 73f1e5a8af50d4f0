"""Recipes: the schema of a fine-tuning job and how a YAML file becomes one.

`schema` declares every setting once, with `data_schema` for those of the rows; docs/recipe.md, the
JSON schema and the page's form derive from it. `parse` reads files and overrides; `strict_yaml`
reads the YAML.
What a recipe does is not here. Start with `schema.Recipe`.
"""

from jetson_ft.recipe.data_schema import DataRecipe, Layout, SourceRecipe
from jetson_ft.recipe.parse import load_recipe, parse_recipe, shipped, summary
from jetson_ft.recipe.schema import (
    LoraRecipe,
    Quantization,
    Recipe,
    TrainRecipe,
    fields,
    json_schema,
    type_name,
)

__all__ = [
    "DataRecipe",
    "Layout",
    "LoraRecipe",
    "Quantization",
    "Recipe",
    "SourceRecipe",
    "TrainRecipe",
    "fields",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "shipped",
    "summary",
    "type_name",
]
