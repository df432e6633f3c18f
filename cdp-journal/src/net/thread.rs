//! Work that blocks, beside a runtime.

use tokio::sync::oneshot;

/// Runs what blocks on a thread of its own. Those that the runtime keeps for such work may all be busy with answers to
/// restores that do not read them: nobody who ships waits for that.
pub(crate) async fn on_own_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<T> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Nobody waits any more if the server is ending.
        let _ = done.send(work());
    })?;
    result
        .await
        .map_err(|_| std::io::Error::other(format!("the thread {name} panicked")))
}
