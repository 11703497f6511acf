"""Layer 2: what is read and written: catalogues, images, tables, artefact folders."""
