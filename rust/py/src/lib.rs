//! `dynadepth._core`: the Rust core as a Python module. Glue only: copies arrays in and out, releases the GIL, maps
//! errors.

// PyO3 hands borrowed arrays over by value.
#![allow(clippy::needless_pass_by_value)]

mod error;
mod forest;
mod sweep;

use pyo3::prelude::*;

/// Compiled core of dynadepth: the sweep planner and the search forest.
#[pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::forest::PyForest;
    #[pymodule_export]
    use crate::sweep::{plan_sweep, PySweepPlan};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
