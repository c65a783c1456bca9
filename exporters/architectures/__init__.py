"""Model families, one module each; `contract.Architecture` lists what a family provides."""
