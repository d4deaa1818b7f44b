//! The one place where errors of the core become Python exceptions.

use dynadepth_core::Error;
use pyo3::PyErr;

pub(crate) use python::{ConfigError, PlanError, SearchError};

/// The exception classes, as `dynadepth.errors` defines them.
mod python {
    #![allow(missing_docs)]
    pyo3::import_exception!(dynadepth.errors, ConfigError);
    pyo3::import_exception!(dynadepth.errors, PlanError);
    pyo3::import_exception!(dynadepth.errors, SearchError);
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
        | Error::TooManyRows { .. } => PlanError::new_err(message),
        Error::Setting { .. }
        | Error::NumTrees { .. }
        | Error::PriorLength { .. }
        | Error::PriorMissing { .. } => ConfigError::new_err(message),
        Error::MaxPlans
        | Error::RewardsLength { .. }
        | Error::BadReward { .. }
        | Error::UnknownTicket { .. }
        | Error::ReusedTicket { .. }
        | Error::UnknownTree { .. }
        | Error::NothingEvaluated { .. }
        | Error::NoPrior => SearchError::new_err(message),
    }
}
