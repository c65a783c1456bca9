"""Model families, one module each; `contract.Architecture` states what a family provides."""
