//! `Forest`: the search behind a lock, its batches as arrays.

use std::sync::{Mutex, PoisonError};

use dynadepth_core::{BestPlan, EditPrior, Forest, ForestSpec, Result, SearchConfig, Selection};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::error::{to_python, ConfigError};

/// Plans of a batch with their trees and tickets.
type Asked<'py> = (
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyArray2<u8>>,
    Bound<'py, PyArray1<u64>>,
);
/// plan, reward, value, depth, visits.
type Best<'py> = (Bound<'py, PyArray1<u8>>, f64, f64, f64, u32);
/// plans, rewards, depths, visits.
type Told<'py> = (
    Bound<'py, PyArray2<u8>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<u32>>,
);
/// mean, variance, count.
type Prior<'py> = (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>, u32);

/// A search over plans for many prompts at once.
#[pyclass(frozen, name = "Forest", module = "dynadepth._core")]
pub(crate) struct PyForest {
    forest: Mutex<Forest>,
}

impl PyForest {
    /// The one door to the forest: releases the GIL before it waits for the lock, and maps errors.
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Forest) -> Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| work(&mut self.forest.lock().unwrap_or_else(PoisonError::into_inner)))
            .map_err(|error| to_python(&error))
    }
}

#[pymethods]
impl PyForest {
    #[new]
    #[pyo3(signature = (num_layers, tree_keys, *, seed, prior, max_evaluations, depth_penalty, exploration, selection,
                        protect, max_depth, max_repeats, max_edits, virtual_loss, probe_trees, round_size, temperature,
                        prior_weight, random_child, interaction, noise, stop_at))]
    #[allow(clippy::too_many_arguments)] // one for each setting, all by keyword
    fn new(
        py: Python<'_>,
        num_layers: usize,
        tree_keys: PyReadonlyArray1<'_, u64>,
        seed: u64,
        prior: Option<(PyReadonlyArray1<'_, f64>, PyReadonlyArray1<'_, f64>, u32)>,
        max_evaluations: u32,
        depth_penalty: f64,
        exploration: f64,
        selection: &str,
        protect: Vec<u32>,
        max_depth: f64,
        max_repeats: u32,
        max_edits: u32,
        virtual_loss: f64,
        probe_trees: u32,
        round_size: u32,
        temperature: f64,
        prior_weight: f64,
        random_child: f64,
        interaction: f64,
        noise: f64,
        stop_at: f64,
    ) -> PyResult<Self> {
        let config = SearchConfig {
            max_evaluations,
            depth_penalty,
            exploration,
            selection: selection_of(selection)?,
            protect,
            max_depth,
            max_repeats,
            max_edits,
            virtual_loss,
            probe_trees,
            round_size,
            temperature,
            prior_weight,
            random_child,
            interaction,
            noise,
            stop_at,
        };
        let prior = prior.map(|(mean, variance, count)| EditPrior {
            mean: mean.as_array().to_vec(),
            variance: variance.as_array().to_vec(),
            count,
        });
        let tree_keys = tree_keys.as_array().to_vec();
        let spec = ForestSpec {
            num_layers,
            config,
            seed,
            tree_keys,
            prior,
        };
        py.detach(|| Forest::new(spec))
            .map(|forest| Self {
                forest: Mutex::new(forest),
            })
            .map_err(|error| to_python(&error))
    }

    /// Hand out up to `max_plans` plans: `(tree, plans, ticket)`.
    fn ask<'py>(&self, py: Python<'py>, max_plans: usize) -> PyResult<Asked<'py>> {
        let (batch, num_layers) = self.run(py, |forest| {
            Ok((forest.ask(max_plans)?, forest.spec().num_layers))
        })?;
        Ok((
            PyArray1::from_vec(py, batch.tree),
            rows(py, batch.plans, num_layers)?,
            PyArray1::from_vec(py, batch.ticket),
        ))
    }

    /// Note the rewards of tickets; all of them, or on an error none.
    fn tell(
        &self,
        py: Python<'_>,
        ticket: PyReadonlyArray1<'_, u64>,
        rewards: PyReadonlyArray1<'_, f64>,
    ) -> PyResult<()> {
        let (ticket, rewards) = (ticket.as_array().to_vec(), rewards.as_array().to_vec());
        self.run(py, |forest| forest.tell(&ticket, &rewards))
    }

    /// Whether every tree is finished.
    #[getter]
    fn finished(&self, py: Python<'_>) -> PyResult<bool> {
        self.run(py, |forest| Ok(forest.is_finished()))
    }

    /// Return whether a tree has nothing left to ask or to be told.
    fn tree_finished(&self, py: Python<'_>, tree: usize) -> PyResult<bool> {
        self.run(py, |forest| forest.tree_finished(tree))
    }

    /// Return the best plan of a tree: `(plan, reward, value, depth, visits)`.
    fn best<'py>(&self, py: Python<'py>, tree: usize) -> PyResult<Best<'py>> {
        Ok(best_tuple(py, self.run(py, |forest| forest.best(tree))?))
    }

    /// Return the plans of a tree that no other beats in depth and reward, as `best` does.
    fn pareto<'py>(&self, py: Python<'py>, tree: usize) -> PyResult<Vec<Best<'py>>> {
        let front = self.run(py, |forest| forest.pareto(tree))?;
        Ok(front.into_iter().map(|plan| best_tuple(py, plan)).collect())
    }

    /// Return all told plans of a tree: `(plans, rewards, depths, visits)`.
    fn evaluated<'py>(&self, py: Python<'py>, tree: usize) -> PyResult<Told<'py>> {
        let (told, num_layers) = self.run(py, |forest| {
            Ok((forest.evaluated(tree)?, forest.spec().num_layers))
        })?;
        Ok((
            rows(py, told.plans, num_layers)?,
            PyArray1::from_vec(py, told.rewards),
            PyArray1::from_vec(py, told.depths),
            PyArray1::from_vec(py, told.visits),
        ))
    }

    /// Return the prior: `(mean, variance, count)`.
    fn prior<'py>(&self, py: Python<'py>) -> PyResult<Prior<'py>> {
        let prior = self.run(py, |forest| forest.prior().cloned())?;
        Ok((
            PyArray1::from_vec(py, prior.mean),
            PyArray1::from_vec(py, prior.variance),
            prior.count,
        ))
    }

    /// Decoder layers of the model.
    #[getter]
    fn num_layers(&self, py: Python<'_>) -> PyResult<usize> {
        self.run(py, |forest| Ok(forest.spec().num_layers))
    }

    /// Number of trees.
    #[getter]
    fn num_trees(&self, py: Python<'_>) -> PyResult<usize> {
        self.run(py, |forest| Ok(forest.num_trees()))
    }
}

fn selection_of(name: &str) -> PyResult<Selection> {
    match name {
        "posterior" => Ok(Selection::Posterior),
        "puct" => Ok(Selection::Puct),
        "drllm" => Ok(Selection::DrLlm),
        _ => Err(ConfigError::new_err(format!(
            "the setting selection is '{name}'; expected 'posterior', 'puct' or 'drllm'"
        ))),
    }
}

fn best_tuple(py: Python<'_>, best: BestPlan) -> Best<'_> {
    (
        PyArray1::from_vec(py, best.plan),
        best.reward,
        best.value,
        best.depth,
        best.visits,
    )
}

fn rows(py: Python<'_>, flat: Vec<u8>, num_layers: usize) -> PyResult<Bound<'_, PyArray2<u8>>> {
    let num_rows = flat.len() / num_layers;
    PyArray1::from_vec(py, flat).reshape([num_rows, num_layers])
}
