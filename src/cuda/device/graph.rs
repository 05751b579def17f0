//! Capturing a sequence of launches once and replaying it as a whole. Knows streams and graphs, and nothing of models.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use cudarc::driver::{
    CudaGraph, result,
    sys::{self, CUgraphInstantiate_flags as Flags, CUstreamCaptureMode as Mode},
};

use super::{Device, explain};

/// A captured region, ready to be replayed.
pub struct Graph {
    graph: CudaGraph,
    /// Keeps the modules loaded whose kernels the graph launches.
    device: Arc<Device>,
    nodes: usize,
    /// What capture and instantiation took.
    capture_time: Duration,
}

impl Graph {
    /// Captures what `record` queues on the device's stream; nothing of it runs.
    ///
    /// # Errors
    /// What `record` met, or the driver. The capture is then aborted, and the stream can be used as before.
    ///
    /// # Safety
    /// Every address that the recorded launches name must stay valid as long as the graph exists.
    pub unsafe fn capture(
        device: &Arc<Device>,
        record: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let start = Instant::now();
        let stream = device.stream();
        stream
            .begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(explain)
            .context("beginning a capture")?;
        if device.failing_captures.load(Ordering::Relaxed) {
            // Waiting for a stream that captures is an error, after which the driver refuses whatever is recorded.
            let _ = device.synchronize();
        }
        if let Err(error) = record() {
            abort(device);
            return Err(error);
        }
        let graph = stream
            .end_capture(Flags(0))
            .map_err(explain)
            .context("ending a capture")?
            .ok_or_else(|| anyhow!("the driver captured nothing"))?;
        let mut nodes = 0;
        device.call(|| {
            // SAFETY: with no array given, this only counts; the graph is alive.
            unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut nodes) }
                .result()
        })?;
        // The first replay should cost what every other does.
        graph
            .upload()
            .map_err(explain)
            .context("uploading a graph")?;
        Ok(Self {
            graph,
            device: device.clone(),
            nodes,
            capture_time: start.elapsed(),
        })
    }

    /// Queues one replay.
    pub fn launch(&self) -> Result<()> {
        self.graph
            .launch()
            .map_err(explain)
            .context("replaying the graph")
    }

    pub fn nodes(&self) -> usize {
        self.nodes
    }

    pub fn capture_time(&self) -> Duration {
        self.capture_time
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // No replay is to be under way; and cudarc destroys a graph in whichever context is current, which this makes
        // the device's.
        let _ = self.device.synchronize();
    }
}

/// Ends a capture that failed and throws away what it holds.
fn abort(device: &Device) {
    // An error here is the failed capture's own, already on its way up.
    let _ = device.call(|| {
        // SAFETY: the stream is the one that is capturing.
        let graph = unsafe { result::stream::end_capture(device.stream().cu_stream()) }?;
        if graph.is_null() {
            return Ok(());
        }
        // SAFETY: the graph was just handed over, and nothing else knows it.
        unsafe { result::graph::destroy(graph) }
    });
}
