"""One module for each published file format; `vidsieve.training.data.layouts` lists them."""
