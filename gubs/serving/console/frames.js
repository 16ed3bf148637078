// Frames of a video file, taken by the browser: the file itself never leaves it.
const COUNT = 8;
const LONGEST_SIDE = 448;

const once = (target, name) =>
  new Promise((resolve, reject) => {
    target.addEventListener(name, resolve, { once: true });
    target.addEventListener("error", () => reject(new Error("this browser cannot play the file")), { once: true });
  });

export async function framesOf(file) {
  const video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(file);
  try {
    await once(video, "loadeddata");
    const scale = Math.min(1, LONGEST_SIDE / Math.max(video.videoWidth, video.videoHeight));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(28, Math.round(video.videoWidth * scale));
    canvas.height = Math.max(28, Math.round(video.videoHeight * scale));
    const frames = [];
    for (let i = 0; i < COUNT; i += 1) {
      video.currentTime = (video.duration * (2 * i + 1)) / (2 * COUNT);
      await once(video, "seeked");
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
      frames.push(canvas.toDataURL("image/jpeg", 0.9).split(",")[1]);
    }
    return { frames, seconds: video.duration };
  } finally {
    URL.revokeObjectURL(video.src);
  }
}
