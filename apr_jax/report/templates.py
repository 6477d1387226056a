"""HTML from templates, which escape every text that they are given."""

import jinja2


def html_templates(package: str, folder: str) -> jinja2.Environment:
    """Returns the templates in a folder of a package.

    Every value that a template shows is escaped, whatever a model wrote, unless the template says
    that it is HTML already (`| safe`). A value that a template names and is not given is an error.

    Args:
      package: name of the package, for example "apr_jax.report".
      folder: name of the folder in it.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader(package, folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return templates
