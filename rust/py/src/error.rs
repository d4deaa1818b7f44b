//! The one place where errors of the core become Python exceptions.

use dynadepth_core::Error;
use pyo3::PyErr;

/// The exception classes, as `dynadepth.errors` defines them.
mod python {
    #![allow(missing_docs)]
    pyo3::import_exception!(dynadepth.errors, PlanError);
}

/// Maps an error of the core to the exception that Python callers catch.
pub(crate) fn to_python(error: &Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::UnknownAction { .. }
        | Error::EmptyPlan { .. }
        | Error::EmptySweep { .. }
        | Error::PlansLength { .. }
        | Error::UnknownExample { .. }
        | Error::TooManyRows { .. } => python::PlanError::new_err(message),
    }
}
