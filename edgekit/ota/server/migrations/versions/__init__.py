"""The revisions, which Alembic finds by their files. The first is the schema that edgekit had before there were any."""
