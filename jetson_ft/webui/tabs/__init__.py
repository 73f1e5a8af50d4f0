"""The page's tabs, one module each; each `build` adds its components and their events."""
