//! `plan_sweep` and `SweepPlan`.

use dynadepth_core::{LayerStep, SweepPlan};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use crate::error::to_python;

/// The index arrays of one layer: first, second, gather, example.
type Step<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
);

/// One pass over the layers that yields the last hidden state of every plan.
#[pyclass(frozen, name = "SweepPlan", module = "dynadepth._core")]
pub(crate) struct PySweepPlan {
    plan: SweepPlan,
}

#[pymethods]
impl PySweepPlan {
    /// Layers of the model.
    #[getter]
    fn num_layers(&self) -> usize {
        self.plan.num_layers()
    }

    /// Visits if every plan ran alone.
    #[getter]
    fn naive_visits(&self) -> u64 {
        self.plan.naive_visits()
    }

    /// Visits of this sweep.
    #[getter]
    fn executed_visits(&self) -> u64 {
        self.plan.executed_visits()
    }

    /// Return the index arrays of a layer: `(first, second, gather, example)`.
    fn layer<'py>(&self, py: Python<'py>, layer_idx: usize) -> PyResult<Step<'py>> {
        let step = self.step(layer_idx)?;
        Ok((
            indices(py, &step.first),
            indices(py, &step.second),
            indices(py, &step.gather),
            indices(py, &step.example),
        ))
    }

    /// Return the state that each plan is in before a layer.
    fn entering<'py>(
        &self,
        py: Python<'py>,
        layer_idx: usize,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(indices(py, &self.step(layer_idx)?.entering))
    }

    /// Return the state that each plan is in after a layer: a row of [states, first results, second results].
    fn leaving<'py>(
        &self,
        py: Python<'py>,
        layer_idx: usize,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(indices(py, &self.step(layer_idx)?.leaving))
    }

    /// Return the results of a layer that are visited no more: rows of [first results, second results].
    fn settled<'py>(
        &self,
        py: Python<'py>,
        layer_idx: usize,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(indices(py, &self.step(layer_idx)?.settled))
    }

    fn __repr__(&self) -> String {
        format!(
            "SweepPlan(num_layers={}, naive_visits={}, executed_visits={})",
            self.plan.num_layers(),
            self.plan.naive_visits(),
            self.plan.executed_visits()
        )
    }
}

impl PySweepPlan {
    fn step(&self, layer_idx: usize) -> PyResult<&LayerStep> {
        self.plan.step(layer_idx).ok_or_else(|| {
            let num_layers = self.plan.num_layers();
            PyIndexError::new_err(format!(
                "layer {layer_idx} is not in the sweep; expected an index below {num_layers}"
            ))
        })
    }
}

fn indices<'py>(py: Python<'py>, rows: &[u32]) -> Bound<'py, PyArray1<i64>> {
    PyArray1::from_iter(py, rows.iter().map(|&row| i64::from(row)))
}

/// Plan one pass over the layers for many plans of many prompts.
#[pyfunction]
pub(crate) fn plan_sweep(
    py: Python<'_>,
    plans: PyReadonlyArray2<'_, u8>,
    example: PyReadonlyArray1<'_, u32>,
    num_examples: usize,
) -> PyResult<PySweepPlan> {
    let num_layers = plans.shape()[1];
    let flat: Vec<u8> = plans.as_array().iter().copied().collect();
    let prompts: Vec<u32> = example.as_array().iter().copied().collect();
    py.detach(|| SweepPlan::new(&flat, &prompts, num_examples, num_layers))
        .map(|plan| PySweepPlan { plan })
        .map_err(|error| to_python(&error))
}
