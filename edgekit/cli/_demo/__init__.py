"""The chapters of `edgekit demo`. Each calls the product as a user would and checks what it claims."""
